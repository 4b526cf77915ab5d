"""The HTTP API and the text behind it: requests in, streams out. Runs in the run process and in its text process."""
