"""
conftest.py: makes pytest know `--student exercises/student.py`. pytest looks for its options beside
the file that is named first on its command line.
"""

pytest_plugins = ["exercises.checks"]
