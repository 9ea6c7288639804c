"""The demo: real events through the real parts, with a simulated upstream, a live view and a report."""
