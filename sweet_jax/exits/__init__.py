"""What every exit said, and what follows from it: policies, calibration, exact curves."""
