"""Programs for who changes the code; `make` calls most of them."""
