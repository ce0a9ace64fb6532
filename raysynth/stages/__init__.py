"""One file per stage; the only package that imports ray."""
