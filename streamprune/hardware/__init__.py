"""The machine: devices, memory, and GPUs as NVML and torch see them."""
