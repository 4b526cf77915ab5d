"""A film of what losses did: from an event log to a page that plays it."""
