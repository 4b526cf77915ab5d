"""A rank's whole step on a processor in one call, in C++: `make setup` builds it where there is a compiler."""
