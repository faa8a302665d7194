{{- define "kubeai.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "kubeai.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "kubeai.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kubeai.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kubeai.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "kubeai.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "kubeai.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "kubeai.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kubeai.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "kubeai.modelServiceAccountName" -}}
{{- if .Values.modelServiceAccount.create -}}
{{- default (printf "%s-models" (include "kubeai.fullname" .)) .Values.modelServiceAccount.name }}
{{- else -}}
{{- default "default" .Values.modelServiceAccount.name }}
{{- end }}
{{- end }}

{{- define "kubeai.stateConfigMapName" -}}
{{- default (printf "%s-autoscaler-state" (include "kubeai.fullname" .)) .Values.modelAutoscaling.stateConfigMapName }}
{{- end }}

{{/* The name of one of the Secrets: (list $ "aws"). */}}
{{- define "kubeai.secretName" -}}
{{- $root := index . 0 }}{{- $which := index . 1 }}{{- $secret := index $root.Values.secrets $which -}}
{{- if and (not $secret.create) (not $secret.name) }}
{{- fail (printf "secrets.%s.name must be set where secrets.%s.create is false" $which $which) }}
{{- end }}
{{- default (printf "%s-%s" (include "kubeai.fullname" $root) $which) $secret.name }}
{{- end }}

{{/* Whether an object is not there yet, or is this release's: (list $ apiVersion kind name).
     What an earlier KubeAI made itself cannot be taken over by Helm, and need not be. */}}
{{- define "kubeai.isOurs" -}}
{{- $root := index . 0 }}
{{- $found := lookup (index . 1) (index . 2) $root.Release.Namespace (index . 3) }}
{{- $meta := (default dict $found).metadata | default dict }}
{{- $release := index (default dict $meta.annotations) "meta.helm.sh/release-name" }}
{{- if or (not $found) (eq (default "" $release) $root.Release.Name) }}yes{{ end }}
{{- end }}
