"""The checks of benchmarks/gpu.py: each is a generator of `Line`s, run by it in a process of its own.

line.py: what a check says; models.py: random models on disk; shares.py: where the time of a step goes; machine.py,
exact.py, speed.py, answers.py and runs.py: the checks; launched.py: what torchrun and accelerate start.
"""
