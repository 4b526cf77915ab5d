"""What only this machine's kernel knows: processes, their deaths, device files. In the run process and its fork server."""
