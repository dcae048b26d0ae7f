"""Parts of benchmarks/train.py: what is trained (cases), by whom (tools), recorded how (record), shown how (table)."""
