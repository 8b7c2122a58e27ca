"""How far every implementation of every op is from its reference: random inputs of odd shapes, and the comparison.

`python -m tokenspeed.kernels numerics` prints the table; the test suite runs the same cases one by one. This is
the one folder beside the backends that is none.
"""
