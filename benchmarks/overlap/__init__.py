"""The benchmark of hosts that compute for several devices at once, beside other code."""
