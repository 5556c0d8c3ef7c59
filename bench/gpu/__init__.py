"""First contact with an NVIDIA GPU: is what runs there right, and how fast is it?"""
