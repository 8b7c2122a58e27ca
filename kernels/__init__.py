"""Kernels: one portable function per operation (`ops`), many implementations, one choice per machine.

`ops` is the only face that layers use. `registry` holds what was declared, `selection` decides,
`python -m tokenspeed.kernels` shows both. A folder beside these files is a backend: its package has a
function `implementations()`. Installed packages add more through the entry-point group
`tokenspeed.kernels`.
"""
