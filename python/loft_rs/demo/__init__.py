"""`loft-rs demo`: teach an embedding model the vocabulary of the code on this machine
(see run.py).
"""
