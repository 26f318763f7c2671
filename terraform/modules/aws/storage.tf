# Buckets for checkpoints and for join tokens, and who may do what with them.

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_18:Access logs are the account's policy
  #checkov:skip=CKV_AWS_144:Checkpoints are not replicated to another region: they would cost more than to compute them again
  #checkov:skip=CKV_AWS_145:S3's own keys; a key of one's own is a policy of the account
  #checkov:skip=CKV2_AWS_6:aws_s3_bucket_public_access_block.this is for both
  #checkov:skip=CKV2_AWS_61:lifecycle_rule below
  #checkov:skip=CKV2_AWS_62:Nobody listens to events of these buckets
  #checkov:skip=CKV_AWS_21:A manifest is never replaced, and tokens must not be kept: old versions would be waste
  for_each      = toset(["checkpoints", "join"])
  bucket_prefix = "${var.name}-${each.key}-"
  # Checkpoints are results: a bucket that has some is not destroyed. Requests and tokens are nothing.
  force_destroy = each.key == "join"
  tags          = local.tags

  server_side_encryption_configuration {
    rule {
      apply_server_side_encryption_by_default {
        sse_algorithm = "AES256"
      }
    }
  }
  lifecycle_rule {
    id                                     = "parts"
    enabled                                = true
    abort_incomplete_multipart_upload_days = 1
  }
  dynamic "lifecycle_rule" {
    for_each = each.key == "join" ? [1] : []
    content {
      id      = "tokens"
      enabled = true
      expiration {
        days = 1
      }
    }
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each                = aws_s3_bucket.this
  bucket                  = each.value.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

data "aws_iam_policy_document" "tls_only" {
  for_each = aws_s3_bucket.this
  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [each.value.arn, "${each.value.arn}/*"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "this" {
  for_each   = aws_s3_bucket.this
  bucket     = each.value.id
  policy     = data.aws_iam_policy_document.tls_only[each.key].json
  depends_on = [aws_s3_bucket_public_access_block.this]
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "coordinator" {
  name               = "${var.name}-coordinator"
  assume_role_policy = data.aws_iam_policy_document.assume.json
  tags               = local.tags
}

resource "aws_iam_role" "node" {
  name               = "${var.name}-node"
  assume_role_policy = data.aws_iam_policy_document.assume.json
  tags               = local.tags
}

data "aws_iam_policy_document" "coordinator" {
  statement {
    sid       = "SeeRequests"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this["join"].arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["requests/*"]
    }
  }
  statement {
    sid       = "AnswerRequests"
    actions   = ["s3:DeleteObject"]
    resources = ["${aws_s3_bucket.this["join"].arn}/requests/*"]
  }
  statement {
    sid       = "GiveTokens"
    actions   = ["s3:PutObject"]
    resources = ["${aws_s3_bucket.this["join"].arn}/tokens/*"]
  }
}

data "aws_iam_policy_document" "node" {
  # ${aws:userid} is ROLE-ID:INSTANCE-ID: a node can ask for itself only, and read no other's token.
  statement {
    sid       = "AskForToken"
    actions   = ["s3:PutObject"]
    resources = ["${aws_s3_bucket.this["join"].arn}/requests/$${aws:userid}"]
  }
  statement {
    sid       = "ReadOwnToken"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.this["join"].arn}/tokens/$${aws:userid}"]
  }
  # Without it S3 says 403, not 404, of a token that is not there yet. Names tell nothing.
  statement {
    sid       = "SeeWhetherItIsThere"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this["join"].arn]
  }
  statement {
    sid       = "Checkpoints"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${aws_s3_bucket.this["checkpoints"].arn}/*"]
  }
  statement {
    sid       = "ListCheckpoints"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this["checkpoints"].arn]
  }
}

resource "aws_iam_role_policy" "coordinator" {
  name   = "join"
  role   = aws_iam_role.coordinator.id
  policy = data.aws_iam_policy_document.coordinator.json
}

resource "aws_iam_role_policy" "node" {
  name   = "join-and-checkpoints"
  role   = aws_iam_role.node.id
  policy = data.aws_iam_policy_document.node.json
}

resource "aws_iam_instance_profile" "this" {
  for_each = { coordinator = aws_iam_role.coordinator.name, node = aws_iam_role.node.name }
  name     = "${var.name}-${each.key}"
  role     = each.value
}
