"""What tools/bench and tools/gpu_check share: models to measure with, measured processes, and figures of them.

Nothing here imports torch, transformers or streamprune but the processes that are started (`workers`).
"""
