"""What a machine's devices can do, and whether the project computes right on them.

    python -m hnas.tools.check_device [--quick True]

A check is a function that is given the :class:`~hnas.tools.check_device.rows.Machine` and yields
rows; ``checks.py`` has the list of them. docs/gpu.md says what each row means.
"""
