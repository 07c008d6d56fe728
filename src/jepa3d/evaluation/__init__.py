"""Evaluation of learned representations: probes, retrieval, few-shot learning, part segmentation,
and tables that compare runs with each other and with published results.
"""
