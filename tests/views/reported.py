"""Constants of the tests of `patternnet report`."""

from ray_jobs.config import Resources

HERE = Resources(workers=0)
METHODS = ("gradient", "patternnet", "patternattribution")
SIX = ("gradient-x-input", "deconvnet", "guided-backprop", *METHODS)
# Each executes code if it is taken for HTML, for the end of an attribute or for the end of a script.
HOSTILE = [
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(2)</script>",
    "<svg onload=alert(3)>",
    "' onmouseover='alert(4)",
    "{{ 7 * 7 }} & \u2028 tail",
]
SECONDS = 2.0  # limit for loading a report of 200 samples
MEGABYTES = 15
