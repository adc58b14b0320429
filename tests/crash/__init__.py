"""Crashes at every point of a life, I/O errors, full disks and power cuts: the parts the tests of docs/crashes.md are made of.

    points.py    counts what a life does to the outside, and lets it end there
    disk.py      a layer under SQLite: every write and sync is a point, can fail, and is kept
    life.py      20 tasks that three agents live
    killing.py   lives them, ends them, resumes them, and compares
    power.py     what a disk may hold after its power was cut

`cd tests && python -m crash` ends the life at every point there is.
"""
