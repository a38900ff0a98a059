"""What a method does to the model: comparisons with intervals, tables, and figures."""
