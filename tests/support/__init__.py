"""What tests of several folders use: servers, streams, engines, waiting, and the workers of pytest-xdist."""
