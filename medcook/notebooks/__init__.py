"""Chapters as notebooks: their two files, the strict runner, the rules they keep, and publishing.

chapters.py    a chapter is notebooks/NN_name.py (the source) and the .ipynb generated from it
parameters.py  the cell tagged `parameters`: plain NAME = literal, nothing unknown accepted
runner.py      `cook`: execute in a fresh kernel, measure, cache by content
measure.py     peak memory of a process tree
lint.py        the rules every notebook keeps
publishing.py  executed `full` notebook -> clean, small, committed .ipynb
"""
