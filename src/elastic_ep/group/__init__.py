"""The controller: it performs what the machines decide about the group. Runs in the run process."""
