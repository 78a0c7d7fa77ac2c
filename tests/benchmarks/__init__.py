"""How fast minivit is beside other libraries: `make bench`, not `make test`."""
