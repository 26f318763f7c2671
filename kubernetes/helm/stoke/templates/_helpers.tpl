{{- define "stoke.name" -}}
{{- if contains "stoke" .Release.Name -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- else -}}{{ printf "%s-stoke" .Release.Name | trunc 40 | trimSuffix "-" }}{{- end -}}
{{- end }}

{{- define "stoke.selector" -}}
app.kubernetes.io/name: stoke
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "stoke.labels" -}}
{{ include "stoke.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* Arguments: the root, and a map that may have repository, tag and digest. */ -}}
{{- define "stoke.image" -}}
{{- $root := index . 0 -}}{{- $image := mergeOverwrite (deepCopy $root.Values.image) (index . 1) -}}
{{- if $image.digest -}}{{ $image.repository }}@{{ $image.digest }}{{- else -}}{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}{{- end -}}
{{- end }}

{{- define "stoke.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "stoke.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- define "stoke.claim" -}}
{{- if .Values.checkpoints.claim.existing -}}{{ .Values.checkpoints.claim.existing }}{{- else if .Values.checkpoints.claim.create -}}{{ include "stoke.name" . }}-checkpoints{{- end -}}
{{- end }}

{{- /* A quantity in Mi or Gi as a number of Mi. */ -}}
{{- define "stoke.mebibytes" -}}
{{- if hasSuffix "Gi" . -}}{{ mul 1024 (trimSuffix "Gi" . | int64) }}{{- else -}}{{ trimSuffix "Mi" . | int64 }}{{- end -}}
{{- end }}

{{- /* All pools with the defaults filled in, as JSON. */ -}}
{{- define "stoke.pools" -}}
{{- $pools := dict -}}
{{- range $name, $pool := .Values.pools -}}{{- $_ := set $pools $name (mergeOverwrite (deepCopy $.Values.poolDefaults) ($pool | default dict)) -}}{{- end -}}
{{- toJson $pools -}}
{{- end }}
