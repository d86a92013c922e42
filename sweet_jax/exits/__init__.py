"""Outputs of the exits, policies, calibration, exact curves and operating points."""
