{{/* The spec of an entry: all that is not metadata. A key set to null counts as not given, 0 and
     false are values. */}}
{{- define "models.spec" -}}
{{- $spec := dict "minReplicas" 0 }}
{{- range $key, $value := omit . "enabled" "labels" "annotations" }}
{{- if not (kindIs "invalid" $value) }}
{{- $_ := set $spec $key $value }}
{{- end }}
{{- end }}
{{- toYaml $spec }}
{{- end }}
