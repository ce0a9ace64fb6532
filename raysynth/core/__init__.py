"""What every layer stands on: experiment files, storage, artifacts, schemas, errors. No torch, no ray."""
