"""What `tools/check_clients` is made of: tiny models, what programs answer for them, and the comparison.

`answers` and the programs that ask a client (`ask_vllm`) run in the client's environment too, so they import nothing
of streamprune.
"""
