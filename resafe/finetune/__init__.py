"""Run one fine-tuning run with mitigations (`train`), or repair one that is finished (`repair`)."""
