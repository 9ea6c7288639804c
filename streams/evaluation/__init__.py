"""The command line of offline evaluation; everything behind it is `gpl.evaluation`."""
