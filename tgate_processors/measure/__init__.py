"""What the gate costs and saves: counted, timed, and seen in the pictures."""
