"""What train.py and sample.py use and no reader of a model needs. lib/README.md lists the files."""
