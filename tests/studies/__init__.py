"""Tests of the studies, of the metrics of one network and of the command line."""
