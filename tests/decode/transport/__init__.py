"""Tests of the ring's transports."""
