"""What `resafe run` puts in front of PYTHONPATH: `sitecustomize.py` and the start-up code. Standard library only."""
