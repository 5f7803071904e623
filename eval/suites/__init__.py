"""The shipped suites, one YAML file each; `resafe.eval.load_suite` reads them."""
