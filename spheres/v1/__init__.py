"""The wire contract, version 1: generated from protos/spheres/v1 by `make stubs`, never edited by hand."""
