"""From one command to the processes of a run: which backend, how many, where, and what becomes of them."""
