"""What the programs of this folder share: data, models, training, and runs that leave records."""
