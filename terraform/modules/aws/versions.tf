terraform {
  required_version = ">= 1.9"
  required_providers {
    # 3.39 is what the tests can apply; versions up to 5 take the same words (docs/clouds.md).
    aws = {
      source  = "hashicorp/aws"
      version = ">= 3.39, < 6.0"
    }
  }
}
