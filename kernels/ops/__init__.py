"""The ops, one file per family: argument checks, output allocation, autograd."""
