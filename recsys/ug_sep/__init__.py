"""Separation of the user side from the candidate side (UG-Sep)."""
