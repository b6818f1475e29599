"""Publishing an output on the Hugging Face Hub: what belongs to it, whether it is complete, and sending it."""
