"""The only modules of the package that know Ray, MLflow and mteb."""
