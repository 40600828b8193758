"""Where this stands, pytest looks for the modules that tests in the folders below share."""
