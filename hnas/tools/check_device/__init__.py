"""What a machine's devices can do, and whether the project computes right on them.

    python -m hnas.tools.check_device [--gpus 0,1] [--full True] [--quick True]

A check is a function that is given the :class:`~hnas.tools.check_device.machine.Machine` and yields
results; a module holds those of one idea. docs/gpu.md says what each row means.
"""
