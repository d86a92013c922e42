"""Exit outputs, policies, calibration, exact curves and operating points."""
