"""Compiles any rank's Ascend graph on a machine without Ascend and reads it."""
