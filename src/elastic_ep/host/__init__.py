"""What this machine's kernel knows: processes, deaths, device files. In the run process and its fork server."""
