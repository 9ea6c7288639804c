"""``gpl bench``: what the system does on this machine, measured through its real parts."""
